use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::*;
use crate::testing::{gemma3, image, tiny, untied};
use crate::training::optimizer::Master;

/// The file that another program would write of the image's tensors after `change`.
fn rewritten(
    image: &Image,
    change: impl Fn(&mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>),
) -> Vec<u8> {
    let mut tensors: Vec<_> = image
        .tensors()
        .iter()
        .map(|entry| {
            let dtype = if entry.storage == Storage::F32 {
                Dtype::F32
            } else {
                Dtype::BF16
            };
            let data = image.bytes()[entry.bytes.clone()].to_vec();
            (entry.name.clone(), dtype, entry.shape.clone(), data)
        })
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (
            name.clone(),
            TensorView::new(*dtype, shape.clone(), data).unwrap(),
        )
    });
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn an_image_survives_its_bytes_in_both_storages() {
    for config in [tiny(), untied()] {
        let master = Master::init(&config, 1).unwrap();
        for storage in [Storage::F32, Storage::Bf16] {
            let image = master.image(storage).unwrap();
            let again = Image::parse(&config, image.bytes()).unwrap();
            assert_eq!(again.bytes(), image.bytes());
            assert_eq!(again.tensors(), image.tensors());
            assert_eq!(again.values(), image.values());
            for (stored, exact) in image.values().iter().zip(master.values()) {
                let bound = if storage == Storage::F32 {
                    0.0
                } else {
                    exact.abs() / 256.0
                };
                assert!((stored - exact).abs() <= bound);
            }
        }
    }
}

#[test]
fn each_entry_locates_the_bytes_of_its_tensor() {
    let config = tiny();
    let image = image(&config, 1);
    let layout = Layout::new(&config);
    let file = SafeTensors::deserialize(image.bytes()).unwrap();
    for (entry, parameter) in image.tensors().iter().zip(layout.parameters()) {
        assert_eq!(entry.name, parameter.name);
        let view = file.tensor(&entry.name).unwrap();
        assert_eq!(view.data(), &image.bytes()[entry.bytes.clone()]);
        assert_eq!(view.shape(), entry.shape);
    }
    let (_, metadata) = SafeTensors::read_metadata(image.bytes()).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn a_file_in_another_order_becomes_the_same_image() {
    let config = untied();
    let image = image(&config, 1);
    let foreign = rewritten(&image, |tensors| tensors.reverse());
    assert_ne!(foreign, image.bytes());
    assert_eq!(
        Image::parse(&config, &foreign).unwrap().bytes(),
        image.bytes()
    );
}

#[test]
fn the_text_decoder_of_a_multimodal_model_becomes_the_same_image() {
    let config = gemma3();
    let image = image(&config, 1);
    for prefix in ["language_model.model.", "model.language_model."] {
        let published = rewritten(&image, |tensors| {
            for (name, ..) in tensors.iter_mut() {
                *name = name.replace("model.", prefix);
            }
            let tower = "vision_tower.vision_model.post_layernorm.bias".to_owned();
            tensors.push((tower, Dtype::I64, vec![1], vec![0; 8]));
        });
        let found = Image::parse(&config, &published).unwrap();
        assert_eq!(found.bytes(), image.bytes());
    }
    let twice = rewritten(&image, |tensors| {
        let (name, dtype, shape, data) = tensors[1].clone();
        let name = name.replace("model.", "model.language_model.");
        tensors.push((name, dtype, shape, data));
    });
    let error = Image::parse(&config, &twice).unwrap_err().to_string();
    assert!(
        error.contains("model.layers.0") || error.contains("language_model"),
        "{error}"
    );
}

#[test]
fn a_tied_head_may_be_stored_if_it_equals_the_embedding() {
    let config = tiny();
    let image = image(&config, 1);
    let with_head = |change: u8| {
        rewritten(&image, |tensors| {
            let (_, dtype, shape, mut data) = tensors[0].clone();
            data[0] ^= change;
            tensors.push(("lm_head.weight".to_owned(), dtype, shape, data));
        })
    };
    let found = Image::parse(&config, &with_head(0)).unwrap();
    assert_eq!(found.bytes(), image.bytes());
    let error = Image::parse(&config, &with_head(1))
        .unwrap_err()
        .to_string();
    assert!(error.contains("tie_word_embeddings"), "{error}");
}

#[test]
fn f16_is_widened_and_mixed_storage_is_kept() {
    let config = tiny();
    let image = Master::init(&config, 1)
        .unwrap()
        .image(Storage::Bf16)
        .unwrap();
    let foreign = rewritten(&image, |tensors| {
        let (_, dtype, _, data) = &mut tensors[0];
        *dtype = Dtype::F16;
        let halves = data
            .as_chunks()
            .0
            .iter()
            .map(|&v| f16::from_f32(bf16::from_le_bytes(v).to_f32()));
        *data = halves.flat_map(|v| v.to_le_bytes()).collect();
    });
    let mixed = Image::parse(&config, &foreign).unwrap();
    assert_eq!(mixed.tensors()[0].storage, Storage::F32);
    assert_eq!(mixed.tensors()[1].storage, Storage::Bf16);
    assert_eq!(
        Image::parse(&config, mixed.bytes()).unwrap().bytes(),
        mixed.bytes()
    );
    let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4;
    assert!(mixed.values().iter().zip(&image.values()).all(close));
}

#[test]
fn a_truncated_file_names_its_first_incomplete_tensor() {
    let config = tiny();
    let image = image(&config, 1);
    let last = &image.tensors().last().unwrap().name;
    let error = Image::parse(&config, &image.bytes()[..image.bytes().len() - 1]).unwrap_err();
    assert!(
        matches!(&error, WeightsError::Truncated { tensor, .. } if tensor == last),
        "{error}"
    );
    for len in [0, 7, 8, 100, 5000] {
        assert!(Image::parse(&config, &image.bytes()[..len]).is_err());
    }
    let longer = [image.bytes(), &[0]].concat();
    assert!(matches!(
        Image::parse(&config, &longer),
        Err(WeightsError::Trailing { extra: 1 })
    ));
}

#[test]
fn tensors_that_contradict_the_configuration_are_refused_by_name() {
    let config = tiny();
    let image = image(&config, 1);
    let name = image.tensors()[2].name.clone();
    let refused = |bytes: &[u8]| Image::parse(&config, bytes).unwrap_err();
    let missing = rewritten(&image, |tensors| drop(tensors.remove(2)));
    let error = refused(&missing);
    assert!(
        matches!(&error, WeightsError::Missing { tensor } if *tensor == name),
        "{error}"
    );
    let extended = rewritten(&image, |tensors| {
        tensors.push(("extra".to_owned(), Dtype::F32, vec![1], vec![0; 4]));
    });
    let error = refused(&extended);
    assert!(
        matches!(&error, WeightsError::Unexpected { tensor } if tensor == "extra"),
        "{error}"
    );
    let transposed = rewritten(&image, |tensors| tensors[0].2.reverse());
    let shape = refused(&transposed);
    assert!(
        matches!(&shape, WeightsError::Shape { found, .. } if found[..] == [24, 37]),
        "{shape}"
    );
    let integer = rewritten(&image, |tensors| tensors[2].1 = Dtype::I32);
    assert!(matches!(refused(&integer), WeightsError::Dtype { tensor, .. } if tensor == name));
    let nan = rewritten(&image, |tensors| {
        tensors[2].3[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let error = refused(&nan);
    assert!(
        matches!(&error, WeightsError::NotFinite { tensor, element: 2 } if *tensor == name),
        "{error}"
    );
}

#[test]
fn values_that_cannot_be_stored_are_refused() {
    let layout = Layout::new(&tiny());
    let mut values = vec![0.0; layout.len()];
    values[layout.len() - 1] = f32::MAX;
    assert!(Image::from_values(&layout, &values, Storage::F32).is_ok());
    // Rounded to bf16 it would be infinite.
    let error = Image::from_values(&layout, &values, Storage::Bf16).unwrap_err();
    assert!(
        matches!(error, WeightsError::NotFinite { tensor, .. } if tensor == "model.norm.weight")
    );
    assert!(Image::from_values(&layout, &values[1..], Storage::F32).is_err());
}

proptest! {
    #[test]
    fn altered_bytes_never_panic(position in 0usize..6000, value: u8, cut in 0usize..6000) {
        let config = tiny();
        let mut bytes = image(&config, 1).bytes().to_vec();
        bytes[position] = value;
        bytes.truncate(bytes.len() - cut);
        drop(Image::parse(&config, &bytes));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Image::parse(&tiny(), &bytes).is_err());
    }
}
